from kernels.tuning import *
