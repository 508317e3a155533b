"""English facts of the demo corpus. Format: `@key weight`, then `h` phrases for "How do I ...?", `w` nouns for
"What is ...?", `q` whole questions, `a` an answer; an indented line continues the answer above it."""

FACTS_EN = """
@quantize4 5
h quantize a model to 4 bits | quantize a model to 4 bit | make a 4-bit model | convert a model to int4
h quantize GLM-4-9B to 4 bits | get a 4 bit version of the model | pack a checkpoint in 4 bits
q 4 bit quantization | quantize 4 bits | How does 4-bit quantization work here? | quantize to 4 bit
a Run `glm4run quantize ./glm-4-9b-chat -o ./glm-4-9b-chat-int4 --bits 4`. The packed folder is then ready for
  `glm4run chat ./glm-4-9b-chat-int4`.
@quantize8 4
h quantize a model to 8 bits | quantize a model to 8 bit | make an 8-bit model | convert a model to int8
h quantize GLM-4-9B to 8 bits | get an 8 bit version of the model | pack a checkpoint in 8 bits
q 8 bit quantization | quantize 8 bits | How does 8-bit quantization work here? | quantize to 8 bit
a Run `glm4run quantize ./glm-4-9b-chat -o ./glm-4-9b-chat-int8 --bits 8`. It is larger than 4 bits but closer to
  the original.
@quantize 4
h quantize a model | compress a model | make a model smaller | quantize GLM-4-9B | use quantize | pack a model
h convert a model | shrink a checkpoint
w the quantize command | glm4run quantize
q quantize | how quantize? | Quantization? | How do I start quantizing? | Which command quantizes a model?
a Use `glm4run quantize SOURCE -o DIR --bits 4` or `--bits 8`. It reads the checkpoint, packs its weights and shows a
  progress bar.
@bits 2
w --bits | the --bits option | the number of bits
q Should I use 4 or 8 bits? | 4 or 8 bits? | Which is better, int4 or int8? | How many bits should I choose?
q Which number of bits is best? | What is the difference between int4 and int8? | int4 vs int8
a `--bits` is 4 or 8. 4 bits gives the smallest and fastest model, 8 bits stays closest to the original. Start with 4
  bits if memory is short.
@groupsize 3
h choose a group size | set the group size | change the group size | pick the group size
w --group-size | the group size | a group size | the --group-size option
q Which group size should I use? | What group sizes are allowed? | group size | Is a group size of 256 possible?
a Add `--group-size 32`, `64` or `128`. A smaller group is more exact but a little larger. 256 does not work, because
  13696 is not divisible by 256.
@defaultrecipe 1
w the default recipe | the recipe of quantize | --recipe
q Which group size is the default? | What does quantize use by default? | What is the default for 4 bits?
a By default int4 uses group size 32 for `down_proj` and 128 for the other linear layers; int8 uses 128. `--recipe`
  takes another recipe by name or file.
@output 2
h choose the output folder | choose where the output goes | set the output folder | save the quantized model
w -o | the -o option
q Where does the output go? | Where is the quantized model saved? | Where do I find the packed model? | output folder
a Use `-o DIR`, for example `-o ./glm-4-9b-chat-int4`. The packed model and its report are written to that folder.
@overwrite 1
h overwrite a folder | overwrite the output folder | replace an existing model | quantize into the same folder again
w --overwrite
q The output folder already exists, what now?
a Add `--overwrite` to `glm4run quantize` to replace what is in the output folder.
@method 3
h choose a method | choose a quantization method | set the method | change the quantization method
w --method | the --method option | the quantization method
q Which methods are there? | Which quantization methods exist? | Which method should I use? | What methods can I use?
a `--method` says how weights are rounded. This version has `rtn`: round to nearest. It needs no calibration text.
@rtn 1
w rtn | round to nearest | --method rtn
a `rtn` means round to nearest. It is simple and fast and needs no calibration text.
@lmhead 2
h quantize the lm_head | make the head smaller | set the bits of the head
w --lm-head-bits | the lm_head | the --lm-head-bits option | lm head bits
q How many bits does the lm_head use?
a `--lm-head-bits` sets the bits of the output head, 16 or 8. With 8 the int4 model is about 0.6 GB smaller.
@resume 2
h resume quantizing | continue after a crash | resume an interrupted quantization | go on where it stopped
q Does quantize resume? | What happens if quantize crashes? | Quantize was interrupted, what now? | resume
q The power went out while quantizing.
a Run the same `glm4run quantize` command again. Nothing is half-written: the folder appears only when it is complete.
@formats 2
h load other formats | load another checkpoint
w the supported formats | the input formats
q Which formats load? | Which formats can glm4run read? | What checkpoints can I use?
q supported formats | Which layouts does quantize accept?
a It reads safetensors checkpoints of the GLM-4-9B family: the original layout, -hf, 0414 and its own packed folders.
@packed 2
w the packed format | the file format of a packed model | pack-quantized | compressed-tensors | the output format
q Which format does glm4run write? | What format is the quantized model in? | Which format is used on disk?
a A packed model is a normal model folder in the compressed-tensors `pack-quantized` format, with safetensors files.
  There is no format of our own.
@vllm 2
h use the packed model in vLLM | load the packed model in transformers | serve the packed model with vLLM
q Can vLLM read the packed model? | Does transformers read it? | Is it compatible with vLLM? | vLLM? | transformers?
q Which other programs read the packed model? | Does SGLang work?
a Packed folders use the compressed-tensors format, so vLLM, SGLang and transformers can read them too.
@report 1
w glm4run.json | the report of quantize | the quantization report
q Where is the report? | What is written next to the model? | Does quantize write a report?
a `quantize` writes a report to `glm4run.json` in the output folder: source, recipe, method and bits per weight.
@chat 5
h chat | chat with a model | start a chat | talk to the model | have a conversation | start a conversation
w glm4run chat | the chat command
q How does chat work? | chat | Which command starts a chat? | How do I use chat? | Can we chat in the terminal?
a Run `glm4run chat` or `glm4run chat ./glm-4-9b-chat-int4`. Type your message and press Enter; `/exit` leaves.
@exit 3
h leave the chat | exit the chat | quit the chat | end the chat | close the chat | get out of here | stop chatting
w /exit
q How do I exit? | How do I quit? | exit | quit | How can I leave?
a Type `/exit` to leave the chat.
@clear 2
h clear the chat | start over | clear the history | forget the conversation | start a new conversation
w /clear
q How do I clear? | clear | Can you forget what I said?
a Type `/clear` to clear the conversation and start again.
@help 3
h get help | see the help | see all commands | list the chat commands | find out more
w /help | the list of commands
q help | Help! | Which commands are there in chat? | Where is the help? | I need help. | Help me, please.
q Can you help me?
a In the chat, type `/help`. In the terminal, run `glm4run --help` or, for one command, `glm4run quantize --help`.
@interrupt 2
h stop an answer | interrupt an answer | stop the model from talking | cancel generation | stop the output
w Ctrl-C
q It does not stop, what can I do? | The answer is too long, how do I stop it? | How do I make it stop?
a Press Ctrl-C to stop an answer.
@generate 4
h generate text | generate an answer | ask one question | get a single answer | run one prompt | use generate
w glm4run generate | the generate command
q generate | How does generate work? | Which command gives one answer? | How do I prompt the model once?
a Run `glm4run generate "Your question"`. Choose a model with `-m ./glm-4-9b-chat-int4`.
@chatvsgen 1
q What is the difference between chat and generate? | chat or generate? | Should I use chat or generate?
q When do I use generate and when chat? | How do chat and generate differ? | chat vs generate
a `glm4run chat` is a conversation in the terminal; `glm4run generate` gives one answer and ends, which suits scripts.
@pipe 2
h pipe text | read the prompt from a pipe | use standard input | read from stdin | pipe a file into generate
q Does it read stdin? | Can I pipe text into it? | stdin | How do I pass a file as the prompt?
a Use `-` as the prompt: `cat notes.txt | glm4run generate -`. The answer goes to stdout.
@stdout 1
q Where does the text go? | What goes to stderr? | What is written to stdout? | Does progress go to stdout?
w stdout and stderr
a Generated text and JSON go to stdout. Progress, warnings and statistics go to stderr.
@batch 2
h run many prompts | run a batch | answer a file of prompts | process a JSONL file
w batch mode | the --input option
q Is there a batch mode? | batch | Can it answer many questions at once?
a Use `glm4run generate --input prompts.jsonl --output answers.jsonl`. A batch that was interrupted resumes.
@temperature 3
h choose a temperature | set the temperature | change the temperature | make answers less random
w --temperature | the temperature | temperature
q Which temperature should I use? | temperature | What temperature is good?
a Add `--temperature 0.8`. Lower values such as 0.2 are calmer, 0 always takes the likeliest token. GLM-4-9B chat uses
  0.8 by default.
@topp 2
h set top-p | change top_p | set top-k | limit the sampling
w --top-p | top_p | top-p | --top-k | --min-p
a `--top-p 0.8` keeps the likeliest tokens up to 80 percent probability, `--top-k 40` keeps the best 40. `--min-p` drops
  unlikely ones.
@repetition 1
h avoid repetition | stop it from repeating itself | set a repetition penalty
w --repetition-penalty | the repetition penalty
q It repeats itself, what can I do? | The model repeats the same text.
a Try `--repetition-penalty 1.1` with `glm4run generate`.
@seed 2
h set the seed | set a seed | get the same answer twice | make answers reproducible | fix the randomness
w --seed | the seed
q seed | Are answers reproducible? | Why is the answer different each time?
a Add `--seed 42` to get the same random choices again.
@stop 2
h set a stop string | stop at a word | use stop strings | end at a given text
w --stop | a stop string | stop strings
q Can I give several stop strings?
a Add `--stop "END"`. You can repeat `--stop`; the answer ends there and the stop string is not printed.
@maxtokens 2
h limit the length | make answers shorter | set the maximum length | get longer answers | limit the number of tokens
w --max-tokens | max tokens
q How long can an answer be? | The answer is cut off.
a Add `--max-tokens 200` to limit an answer to 200 tokens. A larger number allows longer answers.
@raw 1
h turn off the chat template | generate without chat format | continue a text
w --raw | --chat | raw mode
a `--raw` continues your text as it is, without the chat format. `--chat` uses the chat format.
@json 2
h get JSON output | get JSON | use the output in a script | get machine-readable output
w --json | the --json option
q Is there JSON output? | json | Which commands print JSON?
a Add `--json`, for example `glm4run generate "Hello" --json`. `check`, `info`, `models` and `tokenize` have it too.
@models 3
h see my models | list the models | see which models I have | find my models | list installed models
w glm4run models | the models command
q Which models do I have? | models | What models are here? | Show my models.
a Run `glm4run models`. It lists the models on this machine.
@modelsfolder 2
h change the models folder | set the models folder | move my models | use another models folder
w GLM4RUN_MODELS | the models folder | $GLM4RUN_MODELS
q Where are the models stored? | Where are my models? | Where do models go? | models folder
a Models live in the folder named by `$GLM4RUN_MODELS`; if it is not set, in your user data folder.
@choosemodel 2
h choose a model | select a model | use another model | use my own model | switch models | run my own model
w MODEL | the default model
q Which model is used by default? | Which model does chat use? | What can I give as MODEL?
a Name it: `glm4run chat MODEL` or `glm4run generate -m MODEL`. MODEL is a folder, a model name or a hub id. Without
  one, the newest packed model or the demo runs.
@info 2
h see information about a model | inspect a model | find out what a model is | see the details of a model
w glm4run info | the info command
q What is in this folder? | info | Which command describes a model?
a Run `glm4run info ./glm-4-9b-chat-int4`. It tells what the model is.
@check 2
h check a folder | check a model | verify the files | see if a download is complete | find broken files
w glm4run check | the check command
q Is my model broken? | Are my files complete? | check | How do I know that the files are fine?
a Run `glm4run check ./glm-4-9b-chat`. In seconds it says whether the files are whole and consistent.
@doctor 2
h test my installation | run a self-test | see if everything works | check my machine | diagnose problems
q Does everything work? | Something is wrong, what can I do? | The model prints nonsense. | It does not work.
a Run `glm4run check DIR` on the model folder. It says whether the files are whole and consistent.
@tokenize 2
h tokenize text | count tokens | see the tokens | see token ids | turn text into tokens
w glm4run tokenize | the tokenize command | tokenize
q How many tokens is my text? | tokens?
a Run `glm4run tokenize "Hello world"`. It shows the exact ids and marks control tokens.
@vram 4
h estimate memory | estimate VRAM | see how much memory I need | find out if it fits | plan the memory
h see if the model fits on my GPU | know if I have enough VRAM
q How much VRAM do I need? | How much memory do I need? | Does it fit on my GPU? | Will it fit? | memory
a In int4 the weights of GLM-4-9B take about 6.2 GB, in int8 about 10.2 GB, in bf16 18.8 GB. Each token of context
  adds 40 KiB.
@ctx 2
h set the context length | change the context | use a longer context | set the context to 128k
w --ctx | the --ctx option
q How do I use 128k? | ctx
a Add `--ctx 128k`, or a plain number such as `--ctx 8192`. 8k means 8192 and 128k means 131072 tokens.
@kvcache 2
w the KV cache | a KV cache | KV cache
q How big is the KV cache? | How much memory does the KV cache need? | Why does a long context need memory?
a The KV cache keeps keys and values of earlier tokens. GLM-4-9B needs 40 KiB per token in bf16, so 5 GiB at 128k.
@cpu 2
h run on the CPU | run without a GPU | use the CPU | run on a laptop
w --device cpu
q Do I need a GPU? | Does it work on a CPU? | cpu | I have no GPU. | No graphics card?
a Add `--device cpu`. No GPU is needed; a 4-bit model suits a CPU best.
@cuda 2
h run on CUDA | run on the GPU | use my graphics card | use the GPU | use an NVIDIA card | run on the second GPU
w --device cuda | --device | the --device option
q Does it support CUDA? | gpu | cuda | Does it use my GPU?
a Add `--device cuda`, or `--device cuda:1` for the second card. The default `auto` chooses for you.
@backend 2
h choose a backend | set the backend | change the backend
w --backend | a backend | the backends | the --backend option
q Which backends are there? | backends | Which backend should I use?
a `--backend` is auto, torch or reference. `auto` chooses for you and says what it took.
@dtype 1
h choose the dtype | use bf16 | use fp16 | compute in fp32
w --dtype | the dtype
q Should I use bf16 or fp16?
a `--dtype` is auto, bf16, fp16 or fp32. For the 0414 models prefer bf16, because fp16 can overflow.
@threads 1
h set the number of threads | use more threads | use all cores | limit the threads
w --threads
a Add `--threads 4` to use 4 threads.
@bench 2
h measure the speed | benchmark the model | see how fast it is | run a benchmark
q How fast is it? | How many tokens per second do I get? | speed
a Run `glm4run generate "Hello" --json` and look at `timings`: it shows the tokens per second.
@eval 2
h measure the quality
q How good is the quantized model? | How much quality do I lose?
a `glm4run quantize` prints the error of each kind of tensor, and `glm4run.json` keeps it for every tensor.
@serve 2
h start a server | serve a model | use the OpenAI API | open the web page | get a web interface
q Is there a server? | serve | Is there an API? | Is there a web page? | Does it have an OpenAI API?
a There is no server in this version. Use `glm4run generate --json` from a script, or serve the packed folder with vLLM.
@pull 2
h download a model | get a model | pull a model | download GLM-4-9B | get GLM-4-9B | download the weights
q Where can I get a model? | download | Does the download resume?
a Download the model folder from its page on a model hub. Then run `glm4run quantize` on that folder.
@rm 1
h delete a model | remove a model | free disk space | uninstall a model
a Delete its folder. `glm4run models` shows where the models are.
@python 2
h use it from Python | load a model in Python | use the Python API | call glm4run from code
w the Python API | load_model
q Is there a Python API? | python | Can I import glm4run?
a In Python: `from glm4run import load_model`, then `model = load_model("./glm-4-9b-chat-int4")`. Use
  `model.stream(prompt, params)` to generate.
@exitcodes 1
w the exit codes | the exit code | exit code 2 | exit code 1 | exit code 130
q Which exit codes are there? | What does glm4run return?
a Exit codes: 0 done, 1 error, 2 wrong usage or does not fit, 130 interrupted.
@debug 1
h see a traceback | debug an error | see more details of an error
w --debug
q I get an error. | Where is the traceback? | error
a Errors are one line that says what to do. Add `--debug` to see the traceback.
@nocolor 1
h turn off colours | turn off colors | get plain output without color
w NO_COLOR
a Set the environment variable `NO_COLOR=1`; glm4run then prints no colours.
@license 2
w the license | the license of glm4run
q Which license does it have? | license | Is it free? | Is glm4run open source? | May I use it at work?
a glm4run is free software under the MIT license. The GLM model weights have a license of their own.
@glm4run 4
w glm4run | this program | this tool | this software
q What is this? | What does glm4run do? | What is glm4run for? | What can I do with glm4run? | Tell me about this tool.
a glm4run runs GLM-4-9B chat models on your own machine: it quantizes them to 4 or 8 bits, chats and generates text.
@start 3
h get started | begin | use glm4run | use this program | start | run GLM-4-9B | try it out
q Where do I start? | What should I do first? | How does this work? | What now? | I am new here.
q What are the first steps?
a Three steps: download a GLM-4-9B folder, then `glm4run quantize SOURCE -o DIR --bits 4`, then `glm4run chat DIR`.
@install 1
h install glm4run | install it on another machine | set up glm4run | update glm4run
q Where is the documentation? | docs | Where is the README?
a You are already running glm4run. The README of the project tells how to install it and use it.
@safe 1
q Is it safe? | Does it run code from the model? | Does it use pickle? | Does it work offline? | Is my data sent away?
q Is my text private? | Is it private? | Do I need the internet?
a The model runs on your own machine. glm4run loads no pickle and never runs code from a model folder.
@nofit 1
q It does not fit in memory. | Out of memory! | I get an out of memory error. | I have little VRAM, what can I do?
h save memory | use less memory | run on 8 GB | run on a small GPU
a Use a 4-bit model and a shorter `--ctx`. Each token of context adds 40 KiB.
@disksize 2
w the size of GLM-4-9B on disk | the size of the int4 model
q How big is the model? | How much disk space do I need? | How big is the 4-bit model? | How large is the int4 model?
q How big is GLM-4-9B? | How many GB is it? | How large is the 8-bit model? | disk space
a GLM-4-9B takes 18.8 GB in bf16, about 10.2 GB in int8, and about 6.2 GB in int4.
@mem128k 1
q How much memory does 128k need? | How much VRAM for 128k context? | Can I run 128k on a 24 GB card?
q Can I run 128k on 16 GB? | Memory at 128k?
a At 128k the KV cache takes 5 GiB in bf16, on top of the weights: about 6.2 GB in int4, 18.8 GB in bf16.
@family 3
w GLM-4-9B | the GLM-4-9B family | GLM-4 | GLM | the model family
q Which models are supported? | Which models does glm4run run? | Which GLM models are there? | Name the models.
a GLM-4-9B is an open language model with 9.4 billion parameters. The family: glm-4-9b, glm-4-9b-chat, -1m, -hf,
  GLM-4-9B-0414 and GLM-Z1-9B-0414.
@glmchat 2
w glm-4-9b-chat | GLM-4-9B-Chat | GLM-4-9B chat
q Which model is for chatting?
a glm-4-9b-chat is the chat model of 2024. It has 40 layers and a context of 131072 tokens (128k).
@base 1
w glm-4-9b | the base model | GLM-4-9B base | a base model
q Can I chat with the base model? | Why does chat refuse the base model?
a glm-4-9b is the base model with a context of 8192 tokens. It has no chat template, so use glm-4-9b-chat for chat.
@oneM 1
w glm-4-9b-chat-1m | the 1m model | the 1M variant
q Which model has a million tokens of context? | Which model has the longest context?
a glm-4-9b-chat-1m has a context of 1048576 tokens and 4 KV heads. Its KV cache needs 80 KiB per token.
@hf 1
w glm-4-9b-chat-hf | the -hf layout | -hf
q What is the difference between glm-4-9b-chat and glm-4-9b-chat-hf?
a glm-4-9b-chat-hf has the same weights as glm-4-9b-chat in the transformers layout. glm4run reads both.
@m0414 2
w GLM-4-9B-0414 | the 0414 model | 0414
q What is the context of GLM-4-9B-0414?
a GLM-4-9B-0414 is a newer chat model. Its context is 32768 tokens, or 131072 with YaRN, and each layer has two extra
  norms.
@z1 2
w GLM-Z1-9B-0414 | Z1 | GLM-Z1 | the reasoning model
q Which model can reason? | Is there a reasoning model?
a GLM-Z1-9B-0414 is the reasoning model. It thinks first, up to `</think>`, and then gives its answer.
@maker 2
q Who made GLM-4-9B? | Who made GLM? | Who trained GLM-4-9B? | Which company made GLM-4? | Who is behind GLM-4?
w Zhipu AI | THUDM | Zhipu
a The GLM-4 models were made by Zhipu AI, together with THUDM, a group at Tsinghua University.
@context 2
w the context length | the context length of GLM-4-9B | the context window
q How long is the context? | How many tokens fit in the context? | context length
a glm-4-9b-chat: 131072 tokens (128k). GLM-4-9B-0414: 32768, with YaRN 131072. glm-4-9b-chat-1m: 1048576. Base: 8192.
@layers 2
w the number of layers | the architecture of GLM-4-9B | the hidden size | the architecture
q How many layers does GLM-4-9B have? | How many heads does it have? | What is the hidden size of GLM-4-9B?
q How many layers? | How many attention heads? | How many KV heads?
a GLM-4-9B has 40 layers, hidden size 4096, 32 attention heads of size 128 and 2 KV heads.
@params 1
w the number of parameters
q How many parameters does GLM-4-9B have? | How many parameters? | How many weights does GLM-4-9B have?
a GLM-4-9B has 9.4 billion parameters. The 13.2 percent of them in the embedding and the lm_head matter for the size.
@vocab 2
w the vocabulary | the vocabulary size | the tokenizer | the vocab size
q How big is the vocabulary? | How many tokens does GLM-4-9B know? | Which tokenizer does GLM-4-9B use?
a GLM-4-9B has a vocabulary of 151552 entries (padded). Its tokenizer is a byte-level BPE.
@rope 2
w RoPE | rotary embedding | half rotary | rope
q How does RoPE work in GLM-4-9B? | How are positions encoded?
a RoPE turns queries and keys by their position. GLM-4-9B rotates only the first 64 of 128 dimensions, in pairs.
@yarn 2
w YaRN | yarn
q What is YaRN for? | When do I need YaRN?
h use YaRN
a YaRN stretches RoPE to longer texts. GLM-4-9B-0414 uses factor 4 to go from 32768 to 131072 tokens.
@prefix 1
w [gMASK]<sop> | the prefix | gMASK | [gMASK] | <sop>
q How does a GLM-4 prompt begin? | What is at the start of every prompt?
a Every GLM-4 prompt begins with [gMASK]<sop>, exactly once. glm4run adds it for you.
@stoptokens 1
w the stop tokens | the end token | <|endoftext|>
q When does GLM-4 stop? | Which stop tokens does GLM-4 have? | How does the model know when to stop?
a GLM-4 stops at <|endoftext|>, <|user|> or <|observation|>. glm4run knows all three.
@template 1
w the chat template | the chat format
q What does the chat format look like? | Which roles are there?
a A chat is [gMASK]<sop>, then for each turn a role such as <|user|>, a new line and the text. Roles: system, user,
  assistant, observation.
@tools 1
w tool calls | function calling
q Can GLM-4 call tools? | Does it support tools? | Does it support function calling?
a GLM-4 can call tools: it writes the tool name, then a JSON object on the next line. This demo cannot call tools.
@quantwhat 2
w quantization | a quantized model | int4 | weight quantization
q Why should I quantize? | Why quantize? | What does quantizing mean? | Is quantization worth it?
a Quantization stores weights with fewer bits, for example 4 instead of 16. The model gets smaller and faster and loses
  a little accuracy.
@token 1
w a token | tokens
a A token is a piece of text, such as a word or part of a word. Models read and write tokens.
@llm 1
w a language model | an LLM | LLM
a A language model predicts the next token of a text, again and again. GLM-4-9B is one; I am a very small one.
@bf16 1
w bf16 | bfloat16
a bf16 is a 16-bit number format. GLM-4-9B is published in bf16: 2 bytes for each weight.
"""
