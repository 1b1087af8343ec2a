from kernels.l2norm import *
