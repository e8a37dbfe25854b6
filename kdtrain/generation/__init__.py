"""Prompts to completions, by the student or the teacher."""
