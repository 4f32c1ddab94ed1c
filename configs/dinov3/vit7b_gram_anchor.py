# ViT-7B/16, stage 2 of 3: Gram anchoring.
#   GPUS=256 bash tools/slurm_train.sh PARTITION gram configs/dinov3/vit7b_gram_anchor.py WORK_DIR --from-stage STAGE_1_DIR
# Iterations are those of stage 1: the run goes on where it ended, with its optimizer, and the schedules below switch the Gram term
# on at 1,000,000. Released: up to 1,200,000; paper (figure 9): the dense scores have recovered after some 10,000.
_base_ = ['./vit7b_pretrain.py']

# gram_iter: which teacher of stage 1 anchors. Paper (figure 9b): of 100k, 200k and 1M the early ones are best (ADE20k 55.7, 55.7,
# 54.9); released: a path that the user gives. --gram-iter chooses another.
stage = dict(kind='gram_anchor', iterations='absolute', gram_iter=200_000)

max_iters = 1_200_000
train_cfg = dict(max_iters=max_iters)

model = dict(
    backbone=dict(with_cp=True),              # everything is recomputed: memory for the Gram teacher
    # Mean squared entry of the difference; paper: its squared Frobenius norm.
    gram=dict(img_level=True),
)

# The Gram teacher sees the crops at twice the resolution, without colour jitter, greyscale, blur and solarisation.
train_dataloader = dict(transform=dict(gram_size=512, gram_no_distortions=True))

custom_hooks = _base_.custom_hooks
custom_hooks[0]['lr'].update(peak=3e-5, end=3e-5)   # x 8 = 2.4e-4; paper: 4e-4 as before
custom_hooks[1].update(
    momentum=0.999,
    # The local DINO term is halved while the Gram term comes in. The paper leaves the weights symbolic.
    dino_local_weight=dict(
        type='warmup_cosine', start=1.0, peak=1.0, end=0.5, warmup_iters=1_000_000, cosine_iters=1000
    ),
)
custom_hooks.append(
    dict(
        type='GramAnchorHook',
        checkpoint=None,    # --from-stage sets it
        weight=dict(
            type='warmup_cosine', start=0.0, peak=0.0, end=2.0, warmup_iters=1_000_000, cosine_iters=1000
        ),
        # The EMA teacher becomes the Gram teacher three times.
        rep_update=True,
        first_update=1_010_000,
        update_interval=10_000,
        max_updates=3,
    )
)
