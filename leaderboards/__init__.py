"""Records in, tables out. `leaderboards.render.write_board` turns run folders into pages; no torch, no model."""
