"""Token ids to vectors and scores: backbones, the bi-encoder, the model folder."""
