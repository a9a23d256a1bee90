cd "$1"
test "$(target/debug/small)" = "Hello, world!"
cargo build --offline --verbose 2>&1 | grep Fresh
