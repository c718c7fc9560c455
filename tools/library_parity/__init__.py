"""The same weights in timm, open_clip and transformers: how far the feature maps of one differ from another's.

python -m tools.library_parity            # tiny models: every architecture, every pair of libraries, every layer
python -m tools.library_parity --full     # CLIP ViT-L/14-336, SigLIP so400m and DINOv2-L at full width, four blocks
"""
