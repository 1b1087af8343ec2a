from kernels.queue import *
