"""BLIP-2 as captune runs it: continuous batching over its own decoders, several candidates, exact pixels. Torch only,
no Ray.
"""
