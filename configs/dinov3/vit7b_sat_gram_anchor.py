# Satellite ViT-7B/16, stage 2 of 3: 10,000 iterations after the 100,000 of stage 1 (paper section 8.1), with --from-stage.
_base_ = ['./vit7b_gram_anchor.py', '../_base_/satellite.py']

# The paper does not say which teacher anchors: the end of stage 1, unless --gram-iter chooses one.
stage = dict(gram_iter=None)

max_iters = 110_000
train_cfg = dict(max_iters=max_iters)
model = dict(data_preprocessor=_base_.satellite_statistics)
train_dataloader = dict(source=dict(_delete_=True, **_base_.satellite_images))

custom_hooks = _base_.custom_hooks
custom_hooks[1]['dino_local_weight'].update(warmup_iters=100_000)
# The first refresh of the web recipe would come with the last iteration.
custom_hooks[-1] = dict(
    type='GramAnchorHook',
    checkpoint=None,
    weight=dict(
        type='warmup_cosine', start=0.0, peak=0.0, end=2.0, warmup_iters=100_000, cosine_iters=1000
    ),
)

default_hooks = dict(checkpoint=dict(keep_every=10_000))
