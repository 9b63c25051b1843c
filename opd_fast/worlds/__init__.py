"""Bundled worlds: synthetic image domains with prompts, a renderer and verifiers that read pixels."""
