# For type checkers, which do not know that `lars_fused.kernels` lies in kernels/ (`package_dir` in
# setup.py): each stub here stands for the module of the same name there.
