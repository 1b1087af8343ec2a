from kernels.lars_update import *
