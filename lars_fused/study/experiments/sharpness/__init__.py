"""How sharp is the minimum that training with large batches ends in?

The sharpness of Keskar et al., "On Large-Batch Training for Deep Learning: Generalization Gap and
Sharp Minima" (2016), as Definition 2 of the notes "Towards Understanding SGD" (MIT 6.883, 2018,
lecture 6) states it, and what the notes show of it: Table 1, Figures 4, 5 and 7.
"""
