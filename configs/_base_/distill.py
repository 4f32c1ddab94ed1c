# Distillation from a frozen teacher (paper section 5.2): what all students have in common. Values are those of the released files;
# epochs of the release are 1250 iterations, here everything is in iterations.
# The teacher is a ViT-7B with heads of the sizes of its pretraining. Its heads are not public: see docs/distillation.md for a
# teacher of your own, whose backbone and heads you then give in model.distillation.
_base_ = ['./pretrain_runtime.py']

images = dict(type='ImageFolder', root=None)  # --data sets the root

teacher = dict(
    # As it computes for users; its trainer rotated in bf16.
    backbone=dict(type='DINOv3ViT', arch='7b'),
    dino_head=dict(
        type='DINOv3Head', num_prototypes=262_144, hidden_dims=8192, bottleneck_dims=512, num_layers=3
    ),
    # Paper (table 2): 8192 hidden; released configuration: 4096.
    ibot_head=dict(
        type='DINOv3Head', num_prototypes=98_304, hidden_dims=4096, bottleneck_dims=384, num_layers=3
    ),
)

model = dict(
    type='DINOv3',
    distillation=teacher,         # no Gram term, and the student sees all patches
    koleo=dict(weight=0.1),       # within the images of one GPU
    compute_dtype='bf16',
)

# The teacher is sharded with the student. For a teacher that fits the GPU beside the student: strategy=dict(type='PretrainStrategy').
# 'auto': torch.compile for blocks and losses on a GPU.
strategy = dict(type='FSDP2Strategy', param_dtype='bf16', reduce_dtype='fp32', compile_blocks='auto')

train_dataloader = dict(
    source=images,
    # mask_scope='rank': as many masked patches on every GPU as on any other, as in the release.
    masking=dict(mask_probability=0.5, mask_ratio=(0.1, 0.5), mask_scope='rank'),
)

optim_wrapper = dict(
    type='PretrainOptimWrapper',
    constructor='PretrainOptimConstructor',
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999)),  # the schedule sets the rate
    clip_grad=3.0,
)

default_hooks = dict(checkpoint=dict(interval=3750, max_to_keep=3))
