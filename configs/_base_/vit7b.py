# What the three stages of ViT-7B/16 have in common (arXiv 2508.10104 and the released configurations). Epochs of the release are
# 1000 iterations; here everything is in iterations. Its fields that nobody reads are left out.
_base_ = ['./pretrain_runtime.py']

model = dict(
    type='DINOv3',
    backbone=dict(
        type='DINOv3ViT',
        # '7b': 40 blocks of width 4096, 32 heads, SwiGLU of 8192, no bias of q, k and v, 4 registers, LayerNorm eps 1e-5, layer
        # scale 1e-5, a norm of its own for the CLS of local crops.
        arch='7b',
        # RoPE in bf16 throughout, as the released trainer computed; its configuration says fp32, which it ignores. Released files
        # hold the periods of this training, rounded to bf16; a backbone built from them rotates in fp32.
        rope_dtype='bf16',
        rope_rescale_coords=2.0,
        drop_path_rate=0.4,
        with_cp='selective',          # matrix products and attention are kept, the rest is recomputed
    ),
    dino_head=dict(
        type='DINOv3Head', num_prototypes=262_144, hidden_dims=8192, bottleneck_dims=512, num_layers=3
    ),
    # Paper (table 2): 8192 hidden; released configuration: 4096.
    ibot_head=dict(
        type='DINOv3Head', num_prototypes=98_304, hidden_dims=4096, bottleneck_dims=384, num_layers=3
    ),
    # Released: among the 16 images of a GPU, mean over both global crops. Paper: groups of 16 images, first global crop.
    koleo=dict(weight=0.1),
    compute_dtype='bf16',
)

# Sharded over all GPUs: 131 GiB of fp32 weights, gradients, moments and EMA teacher, with a Gram teacher 156 GiB.
# fp8_filter: linear layers of the blocks in float8, as released; for GPUs before Hopper set it to None.
# num_replicas=N shards within groups of (GPUs / N) and replicates over the groups.
strategy = dict(
    type='FSDP2Strategy',
    param_dtype='bf16',
    reduce_dtype='fp32',
    compile_blocks=True,
    fp8_filter='blocks',
)

# Paper (section 3.1): 10 % of the batches from ImageNet-1k alone, 90 % mixed from everything else; of the mixture it names the
# parts and no shares, those below are ours. Released code: one data set, one sampler.
imagenet1k = dict(type='ImageFolder', root='data/imagenet/train')
everything_else = dict(
    type='WeightedConcat',
    parts=[
        dict(type='ImageFolder', root='data/clusters'),       # web images, balanced by hierarchical k-means
        dict(type='ImageFolder', root='data/retrieval'),      # web images near those of curated data sets
        dict(type='ImageFolder', root='data/imagenet22k'),
        dict(type='ImageFolder', root='data/mapillary_sls'),
    ],
    ratios=[0.6, 0.25, 0.1, 0.05],
)

train_dataloader = dict(
    source=dict(type='BatchMixture', parts=[imagenet1k, everything_else], ratios=[0.1, 0.9]),
    # mask_scope='rank': as many masked patches on every GPU as on any other, as in the release.
    masking=dict(mask_probability=0.5, mask_ratio=(0.1, 0.5), mask_scope='rank'),
    num_workers=10,
)

optim_wrapper = dict(
    type='PretrainOptimWrapper',
    constructor='PretrainOptimConstructor',
    optimizer=dict(type='AdamW', lr=5e-5, betas=(0.9, 0.99)),  # the schedule sets the rate
    paramwise_cfg=dict(layerwise_decay=0.98, patch_embed_lr_mult=0.2),
    clip_grad=30.0,
)

# Every 50,000th checkpoint stays, and its teacher export with it: Gram teachers are chosen among them.
default_hooks = dict(checkpoint=dict(interval=1000, max_to_keep=3, keep_every=50_000))
