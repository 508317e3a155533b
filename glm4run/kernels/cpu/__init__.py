"""The native CPU kernels: one C++ library with a C ABI (`src/`), found and bound in `library.py`.

`backend.py` multiplies by packed weights with it, `ops.py` runs what lies between the products of a layer.
"""
