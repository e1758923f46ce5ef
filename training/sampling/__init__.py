"""trm-sample: a model's own replies to training problems, those that are right, as rows to train on."""
