/** Debian's kernels, fetched and unpacked once into .cache/kernels. The machine's own package sources stay as they are. */
import {existsSync, mkdirSync, mkdtempSync, readdirSync, renameSync, rmSync, writeFileSync} from 'node:fs';
import path from 'node:path';
import {fileURLToPath} from 'node:url';
import {must, run} from '../test/helpers/process.js';

export interface Kernel {
	/** As uname says, e.g. `6.12.117+deb12-cloud-amd64`. */
	readonly release: string;
	readonly image: string;
	/** An initramfs archive with /modules/NN-NAME.ko, to be inserted in that order. */
	readonly modules: string;
}

const CACHE = fileURLToPath(new URL('../../.cache/kernels', import.meta.url));
const SUITES = ['debian-security bookworm-security', 'debian trixie-backports'];
/** What the tests' namespaces are made of, and `ss -K`'s side of the kernel; with what they depend on. */
const MODULES = ['veth', 'bridge', 'tcp_diag'];
const FETCH_MS = 600_000;

/** apt with sources, lists and cache of its own. */
class Apt {
	readonly #environment: NodeJS.ProcessEnv;

	constructor() {
		const home = path.join(CACHE, 'apt');
		for (const directory of ['lists/partial', 'archives/partial']) {
			mkdirSync(path.join(home, directory), {recursive: true});
		}

		writeFileSync(`${home}/sources.list`, SUITES.map(suite => `deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/${suite} main\n`).join(''));
		writeFileSync(`${home}/apt.conf`, `
			Dir::Etc::SourceList "${home}/sources.list";
			Dir::Etc::SourceParts "/dev/null";
			Dir::State::Lists "${home}/lists";
			Dir::State::Status "/dev/null";
			Dir::Cache "${home}";
			APT::Sandbox::User "root";
		`);
		this.#environment = {...process.env, APT_CONFIG: `${home}/apt.conf`};
	}

	run(command: string, args: readonly string[], directory = CACHE): string {
		const {code, stdout, stderr} = run(command, args, {timeoutMs: FETCH_MS, env: this.#environment, cwd: directory});
		if (code !== 0) {
			throw new Error(`${command} ${args.join(' ')} ended with ${code}: ${stderr}`);
		}

		return stdout;
	}
}

const numbersOf = (release: string) => [...release.matchAll(/\d+/g)].map(([digits]) => Number(digits));

function compare(a: readonly number[], b: readonly number[]): number {
	const at = a.findIndex((number, index) => number !== b[index]);
	return at === -1 ? a.length - b.length : a[at]! - (b[at] ?? -1);
}

/** Versions leave the mirror, so they are looked for each time. */
export class Kernels {
	readonly #apt = new Apt();
	readonly #releases: readonly string[];

	constructor() {
		this.#apt.run('apt-get', ['update', '-qq']);
		this.#releases = [...this.#apt.run('apt-cache', ['search', '--names-only', '^linux-image-[0-9].*-cloud-amd64$']).matchAll(/^linux-image-(\d+\.\d+\.\S+)/gm)].map(([, release]) => release!)
			.sort((a, b) => compare(numbersOf(a), numbersOf(b)));
	}

	/**
	@param version - `newest`, or how the version begins: the newest of `6.12`.
	@throws when there is none.
	*/
	get(version: string): Kernel {
		const wanted = version === 'newest' ? [] : numbersOf(version);
		const release = this.#releases.findLast(candidate => wanted.every((number, index) => numbersOf(candidate)[index] === number));
		if (release === undefined) {
			throw new Error(`Debian has no kernel ${version} (${SUITES.join(', ')}); it has ${this.#releases.join(', ')}`);
		}

		const home = path.join(CACHE, release);
		if (!existsSync(home)) {
			this.#fetch(release, home);
		}

		return {release, image: path.join(home, 'vmlinuz'), modules: path.join(home, 'modules.cpio')};
	}

	#fetch(release: string, home: string): void {
		console.log(`kernels: fetching ${release}`);
		const work = mkdtempSync(path.join(CACHE, 'work-'));
		try {
			// From 7.0 on the image's package is empty but for what it depends on.
			const parts = this.#apt.run('apt-cache', ['search', '--names-only', `^linux-(binary|modules)-${release.replaceAll(/[.+]/g, String.raw`\$&`)}$`]).split('\n').filter(Boolean).map(line => line.split(' ')[0]!);
			this.#apt.run('apt-get', ['download', '-qq', ...parts.length > 0 ? parts : [`linux-image-${release}`]], work);
			for (const name of readdirSync(work).filter(name => name.endsWith('.deb'))) {
				must('dpkg-deb', '-x', path.join(work, name), `${work}/root`);
			}

			// From Debian 13 on modules are in /usr/lib.
			const base = existsSync(`${work}/root/usr/lib/modules`) ? `${work}/root/usr` : `${work}/root`;
			must('depmod', '-b', base, release);
			const files = MODULES.flatMap(name => must('modprobe', '-d', base, '-S', release, '--show-depends', name).split('\n').flatMap(line => /^insmod (\S+)/.exec(line)?.[1] ?? []));
			mkdirSync(`${work}/image/modules`, {recursive: true});
			for (const [index, file] of [...new Set(files)].entries()) {
				const target = `${work}/image/modules/${String(index).padStart(2, '0')}-${path.basename(file, '.xz')}`;
				must('sh', '-c', file.endsWith('.xz') ? 'xz -dc "$0" > "$1"' : 'cp "$0" "$1"', file, target);
			}

			mkdirSync(`${work}/home`);
			renameSync([`${base}/lib/modules/${release}/vmlinuz`, `${work}/root/boot/vmlinuz-${release}`].find(file => existsSync(file))!, `${work}/home/vmlinuz`);
			archive(`${work}/image`, `${work}/home/modules.cpio`);
			renameSync(`${work}/home`, home);
		} finally {
			rmSync(work, {recursive: true});
		}
	}
}

/** Packs a directory as an initramfs. */
export function archive(directory: string, file: string): void {
	must('sh', '-c', 'cd "$0" && find . | busybox cpio -o -H newc > "$1"', directory, file);
}
