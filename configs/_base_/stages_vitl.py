# Size and learning rate of ViT-L in its three stages.
backbone_size = dict(arch='large', drop_path_rate=0.3)   # ImageNet recipe
# 5e-5 x 4096 / 1024: the rate of the 7B, in inverse proportion to the width. The rule for the batch multiplies it by 4 at
# 1024.
learning_rate = 2e-4
