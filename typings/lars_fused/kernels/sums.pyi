from kernels.sums import *
