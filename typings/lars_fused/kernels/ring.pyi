from kernels.ring import *
