"""Prompts, demonstrations and pairs, from a world or from data as people have it."""
