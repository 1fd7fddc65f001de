"""Who made this engine from what: evidence, model card, bill of materials, signature. All of it is
written from the engine's own directory, so that it cannot say more than the files do."""
