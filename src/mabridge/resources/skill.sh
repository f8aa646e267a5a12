# skill SKILLS NAME TOKEN, with a tar on stdin: puts the archive's "tree" where SKILLS/NAME is. An archive without "end"
# did not arrive whole. Exits with 3 where there is no tar, the old directory removed.
skills=$1 name=$2 part=$1/.skill-$3
LC_ALL=C
export LC_ALL
umask 022
mkdir -p "$skills" || exit 1
if ! command -v tar >/dev/null; then
  rm -rf "$skills/$name" || exit 1
  exit 3
fi
trap 'rm -rf "$part"' EXIT
mkdir "$part" && tar -xof - -C "$part" || exit 1
[ -e "$part/end" ] || { echo 'the archive did not arrive whole' >&2; exit 1; }
rm -rf "$skills/$name" && mv "$part/tree" "$skills/$name"
