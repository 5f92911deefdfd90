"""fastlur."""
