from kernels.last_chunk import *
