# Satellite ViT-7B/16, stage 3 of 3: 8,000 iterations at 512 px (paper section 8.1), with --from-stage. The tiles have 512 px, so
# there is one set of sizes: the first of the web recipe.
_base_ = ['./vit7b_high_res.py', '../_base_/satellite.py']

max_iters = 8000
train_cfg = dict(max_iters=max_iters)
model = dict(data_preprocessor=_base_.satellite_statistics)
train_dataloader = dict(
    source=dict(_delete_=True, **_base_.satellite_images),
    transform=dict(size_sets=[dict(global_size=512, local_size=112, gram_size=768, ratio=1.0)]),
)

# The learning rate ends its rise with the run.
custom_hooks = _base_.custom_hooks
custom_hooks[0]['lr'].update(cosine_iters=8000)

default_hooks = dict(checkpoint=dict(keep_every=None))
