"""The embedded default: a tiny CLIP, eight tasks drawn on the fly, and their experts; the suite that ``--suite demo`` names."""
