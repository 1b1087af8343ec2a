from kernels.layout import *
