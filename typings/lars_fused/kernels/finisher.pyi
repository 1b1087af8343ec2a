from kernels.finisher import *
