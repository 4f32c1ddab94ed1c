# Size and learning rate of ViT-S in its three stages.
backbone_size = dict(arch='small', drop_path_rate=0.1)   # released test configuration of small students
# About 5e-5 x 4096 / 384: the rate of the 7B, in inverse proportion to the width. The rule for the batch multiplies it by 4 at
# 1024.
learning_rate = 5e-4
