"""What several processes of one training agree on."""
