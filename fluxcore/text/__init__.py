"""Prompts to token ids: chat template, tokenizer, padding. Imports no torch."""

from fluxcore.text.tokenizer import PromptTokenizer, TokenizedPrompt

__all__ = ["PromptTokenizer", "TokenizedPrompt"]
