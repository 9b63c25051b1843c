"""Models judged image by image: drawn once, kept while they are judged, and compared in one table."""
