"""What `glm4run vram` answers: what fits, how far, how fast, on which card, what to do where nothing does. No torch.

Everything is said about a `memory.MemoryPlan`, the one that the loader executes. What the runtime cannot do yet (caches
of 8 and 4 bits, NF4, the embedding in RAM, several GPUs, offloaded layers, draft models) is estimated and marked so.
"""
