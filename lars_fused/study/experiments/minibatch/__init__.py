"""Which mini-batch has the gradient nearest to that of all images, and does it train faster?

Lasky, Kesiz Abnoui, Ma, Yang, "What's the Best Mini-batch? Empirical Study on Image
Classification". `compare` is their Algorithm 1, `metrics` their section 3.2, `findings` what they
read from Figures 1 to 4, and `prune` the experiment that they did not come to.
"""
