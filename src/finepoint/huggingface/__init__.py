"""At home with other people's trainers: two lines, the hub, TRL."""
