# Nobody else's folder, as far as git can know.
git="git -c safe.directory=* -C $1/repository"
$git fsck --strict --no-progress
test -z "$($git status --porcelain)"
test "$($git log --oneline | wc -l)" = 1
