from kernels.lars_step import *
