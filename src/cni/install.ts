/**
Keeps the CNI plugin where the container runtime finds it: its file among the runtime's plugins, and an entry for it in the chain of the network that
pods get.

Which network that is, the runtimes decide so, and so do we: the first file, by name, of those in the configuration directory that end in `.conflist`,
`.conf` or `.json` (containerd's go-cni `loadFromConfDir`, CRI-O's ocicni `loadNetworks`). Only a `.conflist` is a chain. For another one a list is made
beside it, and the file itself is set aside as `<name>.sidestep-saved`, which no runtime reads and which `uninstall` puts back.

Nothing here is undone when the agent stops or is upgraded: the plugin goes on holding pods back until the next agent answers.
*/
import {
	chmodSync, closeSync, existsSync, fchmodSync, fchownSync, fsyncSync, mkdirSync, openSync, readFileSync, readdirSync, realpathSync, renameSync, rmSync, statSync, watch, writeFileSync,
	type FSWatcher,
} from 'node:fs';
import path from 'node:path';
import {isDeepStrictEqual} from 'node:util';
import {AgentError, HostError, InputError, hasErrno, reasonOf} from '../errors.js';

export const PLUGIN_NAME = 'sidestep-cni';
/**
How long the plugin holds a pod's start. kubelet waits 4 minutes for a sandbox (`RunPodSandbox` in its remote_runtime.go: twice the
`runtimeRequestTimeout`, which is 2 minutes by default), for the whole chain and for the runtime's own work, and then tries anew: a minute is long
enough for an agent to restart, and leaves the pod's event with our reason in place of a bare time-out.
*/
export const DEFAULT_CNI_TIMEOUT_SECONDS = 60;
/** As in `cni/sidestep-cni.cc`. Older ones have no chain. */
export const CNI_VERSIONS: readonly string[] = ['0.3.0', '0.3.1', '0.4.0', '1.0.0', '1.1.0'];

const SAVED = '.sidestep-saved';
/** No runtime reads a file that ends so. One writer, so one name will do; a leftover is written over. */
const TEMPORARY = '.sidestep-new';
const SETTLE_MS = 100;
const CHECK_MS = 5000;
/** More repairs than this in a minute, and we take turns with somebody: wait, twice as long each time. */
const CALM_REPAIRS = 5;
const CALM_MS = 60_000;
const LONGEST_PAUSE_MS = 60_000;

export interface CniInstallerOptions {
	/** The plugin as it was built. */
	readonly binary: string;
	/** Where the runtime looks for plugins, mostly `/opt/cni/bin`. */
	readonly binDir: string;
	/** Where the runtime looks for networks, mostly `/etc/cni/net.d`. */
	readonly confDir: string;
	/** The agent's socket, as the host sees it. */
	readonly socketPath: string;
	/** @see DEFAULT_CNI_TIMEOUT_SECONDS */
	readonly timeoutSeconds: number;
	/** Namespaces whose pods start without asking the agent. */
	readonly excludeNamespaces?: readonly string[];
	readonly log: (line: string) => void;
	/** For {@link CniInstaller.watch}: compare this often although nothing was heard. */
	readonly checkMs?: number;
}

export interface CniInstallState {
	/** File and entry are in place. */
	readonly installed: boolean;
	/** Why they are not, or why they may not stay so. */
	readonly problem?: string;
}

type Json = Readonly<Record<string, unknown>>;

interface Network {
	/** What the runtime finds, maybe a symbolic link. */
	readonly file: string;
	readonly text: string;
	readonly value: Json;
	readonly plugins: readonly Json[];
}

export class CniInstaller {
	state: CniInstallState = {installed: false, problem: 'the CNI plugin is not installed yet'};
	readonly #options: CniInstallerOptions;
	#watchers: FSWatcher[] = [];
	#check: NodeJS.Timeout | undefined;
	#settle: NodeJS.Timeout | undefined;
	/** Identities of the built and the installed file when they were last found to be the same. */
	#compared = '';
	#repairs: number[] = [];
	#pauseMs = 0;
	#pausedUntil = 0;

	constructor(options: CniInstallerOptions) {
		this.#options = options;
	}

	/**
	Puts file and entry in place; changes nothing that is right already. If we die in between, the next call finishes: the file comes first, so an entry
	never names a plugin that is not there.

	@throws HostError when there is no network yet, or something cannot be read or written; InputError when a network's file is not what the runtimes
	take. `state` tells the same.
	*/
	install(): void {
		try {
			this.#installFile();
			this.#installEntry();
			this.state = performance.now() < this.#pausedUntil ? {installed: true, problem: this.#fight()} : {installed: true};
		} catch (error) {
			this.state = {installed: false, problem: reasonOf(error)};
			throw error instanceof AgentError ? error : new HostError(`the CNI plugin cannot be installed (${reasonOf(error)})`, `look at ${this.#options.binDir} and ${this.#options.confDir}, and how they are mounted`, {cause: error});
		}
	}

	/** Installs now, and again whenever another program has changed something; tells in `state` and in the log what keeps it from that. */
	watch(): void {
		this.#check ??= setInterval(() => {
			this.#turn();
		}, this.#options.checkMs ?? CHECK_MS).unref();
		this.#turn();
	}

	/** Ends `watch`; leaves everything in place. */
	close(): void {
		clearInterval(this.#check);
		clearTimeout(this.#settle);
		this.#check = undefined;
		this.#deafen();
	}

	/**
	Takes our entry out of every network, puts back what was set aside, then removes the plugin.

	CRI-O ends a pod with the chain that the pod was started with: a pod of before cannot end there without the plugin's file, so keep it until
	they are gone. containerd takes the chain as it is now.

	@throws HostError or InputError for the first thing that could not be done; the rest is done all the same.
	*/
	uninstall({keepFile = false}: {readonly keepFile?: boolean} = {}): void {
		this.close();
		const {binDir, confDir} = this.#options;
		const errors: unknown[] = [];
		const attempt = (act: () => void) => {
			try {
				act();
			} catch (error) {
				errors.push(error);
			}
		};

		for (const name of listNames(confDir)) {
			attempt(() => {
				this.#takeOut(path.join(confDir, name));
			});
		}

		if (!keepFile && errors.length === 0) {
			attempt(() => {
				rmSync(path.join(binDir, PLUGIN_NAME), {force: true});
			});
		}

		attempt(() => {
			rmSync(path.join(binDir, PLUGIN_NAME + TEMPORARY), {force: true});
		});
		this.state = {installed: false, problem: 'the CNI plugin is uninstalled'};
		if (errors.length > 0) {
			throw errors[0] instanceof AgentError ? errors[0] : new HostError(`the CNI plugin cannot be uninstalled (${reasonOf(errors[0])})`, `take \`"type": "${PLUGIN_NAME}"\` out of the files in ${confDir} by hand`, {cause: errors[0]});
		}
	}

	#installFile(): void {
		const {binary, binDir, log} = this.#options;
		const target = path.join(binDir, PLUGIN_NAME);
		const identities = () => `${identityOf(binary)} ${identityOf(target)}`;
		if (this.#compared === identities()) {
			return;
		}

		const bytes = readFileSync(binary);
		if (isSameFile(target, bytes)) {
			this.#compared = identities();
			return;
		}

		mkdirSync(binDir, {recursive: true});
		// A file that runs cannot be written to (ETXTBSY), but a name can be given to another one.
		replaceFile(target, bytes, {mode: 0o755});
		log(`installed the CNI plugin ${target}`);
	}

	#installEntry(): void {
		const {confDir, log} = this.#options;
		const network = readFirstNetwork(confDir);
		const entry = this.#entry();
		const present = network.plugins.filter(({type}) => type === PLUGIN_NAME);
		if (present.length === 1 && isDeepStrictEqual(present[0], entry)) {
			return;
		}

		// Behind the others, so that they are done when the agent is asked; one that was put behind us later stays there.
		const plugins = present.length === 1
			? network.plugins.map(plugin => plugin.type === PLUGIN_NAME ? entry : plugin)
			: [...network.plugins.filter(({type}) => type !== PLUGIN_NAME), entry];
		this.#waitForTurn();
		if (isList(network.file)) {
			replaceUnchanged(network, {...network.value, plugins});
			this.#countRepair();
			log(`put the CNI plugin into ${network.file}`);
			return;
		}

		// Until the second step the runtimes go on with the file that they know, as its name comes first; or with the list, where it does.
		const list = listBeside(network.file);
		if (existsSync(list) && !readFileSync(list, 'utf8').includes(PLUGIN_NAME)) {
			throw new HostError(`${network.file} cannot be made a list (${list} is there, and another program's)`, 'remove the one of the two that is not needed; the runtimes read the first');
		}

		replaceFile(list, toText({cniVersion: network.value['cniVersion'], name: network.value['name'], plugins}), statSync(network.file));
		renameSync(network.file, network.file + SAVED);
		syncDirectory(confDir);
		this.#countRepair();
		log(`made ${list} of ${network.file}, with the CNI plugin; the file is kept as ${network.file}${SAVED}`);
	}

	#entry(): Json {
		const {socketPath, timeoutSeconds, excludeNamespaces = []} = this.#options;
		return {type: PLUGIN_NAME, socket: socketPath, timeoutSeconds, ...(excludeNamespaces.length > 0 ? {excludeNamespaces} : {})};
	}

	/** @throws HostError when it is not our turn: another program undoes each change. */
	#waitForTurn(): void {
		const now = performance.now();
		if (now < this.#pausedUntil) {
			throw new HostError(this.#fight(), `find out which one and stop it; put back in ${Math.ceil((this.#pausedUntil - now) / 1000)} s, and pods that start until then are captured late`);
		}
	}

	/** Counts a change of a network that was made; one that failed was undone by nobody. */
	#countRepair(): void {
		const now = performance.now();
		this.#repairs = [...this.#repairs.filter(at => now - at < CALM_MS), now];
		if (this.#repairs.length > CALM_REPAIRS) {
			this.#pauseMs = Math.min(LONGEST_PAUSE_MS, Math.max(1000, 2 * this.#pauseMs));
			this.#pausedUntil = now + this.#pauseMs;
		} else {
			this.#pauseMs = 0;
		}
	}

	#fight(): string {
		return `another program takes the CNI plugin out of ${this.#options.confDir} again and again`;
	}

	#takeOut(file: string): void {
		const {log} = this.#options;
		if (file.endsWith(TEMPORARY)) {
			rmSync(file, {force: true});
			return;
		}

		if (file.endsWith(SAVED)) {
			const original = file.slice(0, -SAVED.length);
			// Written anew by whoever it belongs to: that one is the newer.
			if (existsSync(original)) {
				rmSync(file);
			} else {
				renameSync(file, original);
			}

			rmSync(listBeside(original), {force: true});
			syncDirectory(path.dirname(file));
			log(`put back ${original}`);
			return;
		}

		// A list that we made may have gone with the file that it was made of.
		if (!isList(file) || !existsSync(file) || !readFileSync(file, 'utf8').includes(PLUGIN_NAME)) {
			return;
		}

		const network = readNetwork(file);
		const plugins = network.plugins.filter(({type}) => type !== PLUGIN_NAME);
		if (plugins.length < network.plugins.length) {
			replaceUnchanged(network, {...network.value, plugins});
			log(`took the CNI plugin out of ${file}`);
		}
	}

	#turn(): void {
		const {binDir, confDir, log} = this.#options;
		// The one for plugins is made by the first turn.
		if (this.#watchers.length < 2) {
			this.#deafen();
			this.#watchers = [confDir, binDir].flatMap(directory => this.#listen(directory));
		}

		const before = this.state;
		try {
			this.install();
			if (!before.installed && before.problem !== undefined) {
				log('the CNI plugin is in place');
			}
		} catch (error) {
			// The same sentence once, but for the seconds in it.
			if (before.problem?.replace(/\d+ s/, '') !== reasonOf(error).replace(/\d+ s/, '')) {
				log(reasonOf(error));
			}
		}
	}

	/** Makes it quick, no more: what is not heard is found by the check. */
	#listen(directory: string): FSWatcher[] {
		try {
			const watcher = watch(directory, () => {
				// Whoever writes may not be done yet.
				clearTimeout(this.#settle);
				this.#settle = setTimeout(() => {
					this.#turn();
				}, SETTLE_MS).unref();
			});
			watcher.on('error', () => undefined);
			return [watcher.unref()];
		} catch {
			return [];
		}
	}

	#deafen(): void {
		for (const watcher of this.#watchers.splice(0)) {
			watcher.close();
		}
	}
}

/** Files of networks in `confDir` whose chain has the plugin. One that cannot be read is passed over: a runtime that shares our view of the host cannot either. */
export function networksWithPlugin(confDir: string): readonly string[] {
	const hasPlugin = (file: string) => {
		try {
			return readFileSync(file, 'utf8').includes(PLUGIN_NAME);
		} catch {
			return false;
		}
	};

	try {
		return listNames(confDir).filter(isList).map(name => path.join(confDir, name)).filter(hasPlugin);
	} catch {
		return [];
	}
}

const isList = (file: string) => file.endsWith('.conflist');
const listBeside = (file: string) => file.replace(/\.(?:conf|json)$/, '.conflist');
const toText = (value: Json) => `${JSON.stringify(value, undefined, 2)}\n`;

/** Sorted as Go does, by bytes. */
function listNames(directory: string): readonly string[] {
	try {
		return readdirSync(directory, {withFileTypes: true}).filter(entry => !entry.isDirectory()).map(({name}) => name).sort((a, b) => Buffer.compare(Buffer.from(a), Buffer.from(b)));
	} catch (error) {
		if (hasErrno(error, 'ENOENT')) {
			return [];
		}

		throw error;
	}
}

function readFirstNetwork(confDir: string): Network {
	const name = listNames(confDir).find(candidate => ['.conf', '.conflist', '.json'].includes(path.extname(candidate)));
	if (name === undefined) {
		throw new HostError(`there is no CNI network in ${confDir} yet`, 'install a CNI (the plugin is put into its chain as soon as it is there), or name the directory that the container runtime reads');
	}

	return readNetwork(path.join(confDir, name));
}

/** @throws InputError when the runtimes would not take it, or a pod would not start with us in it. */
function readNetwork(file: string): Network {
	let text: string;
	try {
		text = readFileSync(file, 'utf8');
	} catch (error) {
		throw new HostError(`the CNI network ${file} cannot be read (${reasonOf(error)})`, 'if it is a symbolic link, mount the directory that it leads to as well', {cause: error});
	}

	let value: unknown;
	try {
		value = JSON.parse(text, (_key, item: unknown) => {
			if (typeof item === 'number' && Math.abs(item) > Number.MAX_SAFE_INTEGER) {
				throw new InputError(file, `a number as large as ${item} would not survive a change of the file: add the plugin by hand`);
			}

			return item;
		});
	} catch (error) {
		throw error instanceof InputError ? error : new InputError(file, `is not JSON (${reasonOf(error)}): left as it is; correct it, and the plugin is put into it`, {cause: error});
	}

	if (!isObject(value)) {
		throw new InputError(file, 'expected an object');
	}

	const plugins = isList(file) ? value['plugins'] : [value];
	if (!Array.isArray(plugins) || plugins.length === 0 || !plugins.every((plugin): plugin is Json => isObject(plugin) && typeof plugin['type'] === 'string')) {
		throw new InputError(file, isList(file) ? 'expected `plugins`, a list of objects with a `type`' : 'expected a `type`; a list of plugins belongs into a .conflist');
	}

	if (typeof value['name'] !== 'string' || value['name'] === '') {
		throw new InputError(file, 'expected a `name`');
	}

	if (!CNI_VERSIONS.includes(value['cniVersion'] as string)) {
		throw new InputError(file, `its cniVersion is ${JSON.stringify(value['cniVersion']) ?? 'not said, which means 0.1.0'}, and the plugin takes ${CNI_VERSIONS.join(', ')}: change it`);
	}

	return {file, text, value, plugins};
}

const isObject = (value: unknown): value is Json => typeof value === 'object' && value !== null && !Array.isArray(value);

/** @throws HostError when the file is not what it was when it was read: it belongs to another program. */
function replaceUnchanged({file, text}: Network, value: Json): void {
	const real = realpathSync(file);
	replaceFile(real, toText(value), statSync(real), () => {
		if (readFileSync(file, 'utf8') !== text) {
			throw new HostError(`another program changed ${file} at the same time`, 'try again');
		}
	});
}

/**
Whoever opens the file gets the old one or the new one, whole, also after a power cut.

@param check - called last before the change.
*/
function replaceFile(file: string, content: string | Buffer, {mode, uid, gid}: {readonly mode: number; readonly uid?: number; readonly gid?: number}, check?: () => void): void {
	const temporary = file + TEMPORARY;
	rmSync(temporary, {force: true});
	const fd = openSync(temporary, 'wx', 0o600);
	try {
		writeFileSync(fd, content);
		if (uid !== undefined && gid !== undefined) {
			fchownSync(fd, uid, gid);
		}

		fchmodSync(fd, mode & 0o7777);
		fsyncSync(fd);
	} finally {
		closeSync(fd);
	}

	try {
		check?.();
		renameSync(temporary, file);
	} catch (error) {
		rmSync(temporary, {force: true});
		throw error;
	}

	syncDirectory(path.dirname(file));
}

function syncDirectory(directory: string): void {
	const fd = openSync(directory, 'r');
	try {
		fsyncSync(fd);
	} finally {
		closeSync(fd);
	}
}

/** Another one after any change of the file. */
function identityOf(file: string): string {
	const stat = statSync(file, {bigint: true, throwIfNoEntry: false});
	return stat ? [stat.dev, stat.ino, stat.size, stat.ctimeNs].join(':') : '';
}

function isSameFile(file: string, bytes: Buffer): boolean {
	try {
		if (!readFileSync(file).equals(bytes)) {
			return false;
		}
	} catch (error) {
		if (hasErrno(error, 'ENOENT')) {
			return false;
		}

		throw error;
	}

	if ((statSync(file).mode & 0o777) !== 0o755) {
		chmodSync(file, 0o755);
	}

	return true;
}
