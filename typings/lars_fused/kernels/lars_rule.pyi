from kernels.lars_rule import *
