from kernels.lars_resident import *
