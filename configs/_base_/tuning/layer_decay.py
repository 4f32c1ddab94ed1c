# Trains the whole backbone, the lower a layer the more slowly. In a config that has a frozen backbone:
#
#     _base_ = ['./linear_vitb16_in1k.py', '../_base_/tuning/layer_decay.py']
#     model = dict(backbone=_base_.tuned_backbone)
#     optim_wrapper = _base_.tuned_optim_wrapper
#
# Layer decay, weight decay and drop path are those of MAE fine-tuning (arXiv 2111.06377, table 9). The learning rate
# is no published one: a careful start; see docs/tuning.md.
tuned_backbone = dict(frozen_stages=-1, drop_path_rate=0.1)

tuned_optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    constructor='LayerDecayOptimConstructor',
    optimizer=dict(type='AdamW', lr=1e-4, weight_decay=0.05, betas=(0.9, 0.999)),
    paramwise_cfg=dict(layerwise_decay=0.75),
    clip_grad=dict(max_norm=3.0),
)

# The mask token of a ViT belongs to pretraining and gets no gradient here.
find_unused_parameters = True
