# Distil a ViT-7B into ViT-S, S+, B and L at once, each in a group of ranks. Layout, batch and values of the released file, which is a
# full dump for the ViT-L; the files of its other students are not released. 296 GPUs read 7 images each; 152 of the 2072 are dropped.
#   GPUS=296 bash tools/slurm_train.sh PARTITION distill configs/dinov3/distill_multi.py WORK_DIR --data DIR --teacher FILE
# With 8 GPUs, or one: docs/distillation.md.
_base_ = ['../_base_/distill_vit.py']

shared = _base_.model
backbone = shared.pop('backbone')
# Every rank holds the whole teacher here: 28 GB in fp32 for the 7B with its heads. Rank groups are not sharded.
strategy = dict(_delete_=True, type='MultiDistillationStrategy', compile_blocks='auto')

model = dict(
    _delete_=True,
    type='MultiDistillation',
    teacher=shared.pop('distillation'),
    compute_dtype=shared.pop('compute_dtype'),
    # What the students share: arguments of DINOv3.
    student=dict(
        backbone=backbone,
        dino_head=shared.dino_head,
        ibot_head=shared.ibot_head,
        koleo=shared.koleo,
    ),
    # What is their own. ranks: the first, and one past the last. The paper sizes the groups so that their steps take equally long.
    students=dict(
        vits=dict(backbone=dict(arch='small'), ranks=(0, 48)),
        vitsp=dict(backbone=dict(arch='small_plus'), ranks=(48, 96)),
        vitb=dict(backbone=dict(arch='base'), ranks=(96, 176)),
        vitl=dict(backbone=dict(arch='large'), ranks=(176, 296)),
    ),
)

train_cfg = dict(surplus=True)  # 296 does not divide 1920

# Every hook but that of the teacher runs for each student; students=dict(NAME=dict(...)) changes it for one.
custom_hooks = [
    hook if hook['type'] == 'DistillationHook' else dict(type='PerStudentHook', hook=hook)
    for hook in _base_.custom_hooks
]
