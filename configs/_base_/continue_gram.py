# Continue with a Gram teacher: the released backbone holds the similarities between patches where they are. For dense tasks,
# long runs, and data unlike photographs; it costs about a third of the time.
_base_ = ['./continue.py']

model = dict(gram=dict(weight=1.0, img_level=True))

# 1.5 times the global crops, as in the high-resolution stage; without colour jitter and blur, as in both Gram stages.
train_dataloader = dict(transform=dict(gram_size=336, gram_no_distortions=True))

custom_hooks = [
    *_base_.custom_hooks,
    # Before the first step the EMA teacher is the released backbone. It stays the Gram teacher for the whole run.
    dict(type='GramAnchorHook', load_ema_at=0),
]
