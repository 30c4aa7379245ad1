"""The layers of FSAE, one file a kind. Shapes: video features are `B C T H W`; attention folds time into the batch."""
