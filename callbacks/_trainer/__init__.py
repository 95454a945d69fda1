"""Everything that knows how a Lightning ``Trainer`` works inside; no other file does.

``lightning.pytorch`` and ``pytorch_lightning`` are one code base under two names; the modules here never
compare classes across them.
"""
