from kernels.memory import *
