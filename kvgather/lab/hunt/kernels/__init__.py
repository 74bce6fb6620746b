"""The kernels of the hunt, each with its launcher, an oracle without Triton, and its inputs.

A module has a kernel with a bug, its launcher, `oracle(**inputs)` with the right contents of the tensors that the
launcher fills, and `inputs(...)`, which makes the launcher's arguments for one geometry. The bugs are models: short
kernels of our own, with the fault of a bug that an engine or a kernel library had.
"""

from ....kernels.launch import patch_interpreter

patch_interpreter()  # these kernels are launched without our launchers, some with loops up to a loaded number
