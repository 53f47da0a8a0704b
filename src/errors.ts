/**
Every error that sidestep raises on purpose. Shape of a message: what failed (why, in the kernel's word): what to do. Match on `code`, which is
stable; the native error, if there is one, is `cause`.
*/
import {isNativeError} from './native.js';

export abstract class AgentError extends Error {
	abstract readonly code: string;

	constructor(message: string, options?: ErrorOptions) {
		super(message, options);
		this.name = new.target.name;
	}
}

/** The kernel's word for a failure, e.g. `EPERM: operation not permitted`; the message itself for other errors. */
export function reasonOf(error: unknown): string {
	if (error instanceof Error) {
		return error.message.split('\n', 1)[0]!;
	}

	return String(error);
}

export function hasErrno(error: unknown, ...codes: readonly string[]): boolean {
	return error instanceof Error && codes.includes((error as NodeJS.ErrnoException).code ?? '');
}

/** Something in a file or an option that the user wrote. */
export class InputError extends AgentError {
	readonly code = 'ERR_INPUT';

	/** @param where - file, and the path to the value inside it: `pods.yaml: pods[1].proxy.port`. */
	constructor(readonly where: string, readonly problem: string, options?: ErrorOptions) {
		super(`${where}: ${problem}`, options);
	}
}

/** A pod's namespace, address or cgroup is not what the pods file says. Concerns that pod only. */
export class PodError extends AgentError {
	readonly code = 'ERR_POD';

	constructor(readonly pod: string, readonly problem: string, options?: ErrorOptions) {
		super(`pod ${pod}: ${problem}`, options);
	}
}

/** There is no such namespace, or none that is a pod's: nobody is there. */
export class NowhereError extends PodError {}

export class NotLoadedError extends AgentError {
	readonly code = 'ERR_NOT_LOADED';

	constructor(readonly path: string, options?: ErrorOptions) {
		super(`nothing is pinned at ${path}: start \`sidestep run\`, or name the right --bpffs`, options);
	}
}

export class LockedError extends AgentError {
	readonly code = 'ERR_LOCKED';

	constructor(readonly path: string, options?: ErrorOptions) {
		super(`another sidestep writes to ${path} (its lock is taken): stop that agent first`, options);
	}
}

/** The pins are another version's. */
export class LayoutVersionError extends AgentError {
	readonly code = 'ERR_LAYOUT_VERSION';

	/** @param pinned - as `layout v3 of sidestep 0.2.0`; likewise `ours`. */
	constructor(readonly path: string, readonly pinned: string, readonly ours: string, readonly isNewer: boolean) {
		super(`${path} holds ${pinned}, and this is ${ours}: ${isNewer
			? 'there is no way back, as older programs cannot read newer maps; go on with that version, or run its `sidestep unload` first'
			: 'use that version\'s commands, or start `sidestep run` of this one, which upgrades without a gap'}`);
	}
}

/** Nothing is changed then: the older programs go on. */
export class MigrationError extends AgentError {
	readonly code = 'ERR_MIGRATION';

	constructor(readonly from: number, readonly to: number, readonly problem: string, options?: ErrorOptions) {
		super(`layout v${from} cannot be upgraded to v${to} (${problem}); nothing was changed: start the version that made it, go by a version in between, or run its \`sidestep unload\` and start this one`, options);
	}
}

/** The agent died in the middle of an upgrade, after the point of no return. */
export class UnfinishedUpgradeError extends AgentError {
	readonly code = 'ERR_UNFINISHED_UPGRADE';

	constructor(readonly path: string, readonly from: number, readonly to: number) {
		super(`${path} is in the middle of an upgrade from layout v${from} to v${to}: start \`sidestep run\`, which finishes it`);
	}
}

export class ForeignPinError extends AgentError {
	readonly code = 'ERR_FOREIGN_PIN';

	constructor(readonly path: string, readonly problem: string, options?: ErrorOptions) {
		super(`${path} was not made by sidestep (${problem}): remove it by hand if you know that nobody uses it, or choose another --bpffs`, options);
	}
}

export class IncompletePinsError extends AgentError {
	readonly code = 'ERR_INCOMPLETE_PINS';

	constructor(readonly path: string, readonly missing: readonly string[], options?: ErrorOptions) {
		super(`${path} lacks ${missing.join(', ')}: somebody removed pins; run \`sidestep unload\`, then start again`, options);
	}
}

export class MapIncompatibleError extends AgentError {
	readonly code = 'ERR_MAP_INCOMPATIBLE';

	constructor(readonly path: string, readonly differences: readonly string[], options?: ErrorOptions) {
		super(`pinned map ${path} does not fit this build (${differences.join(', ')}): run \`sidestep unload\`, then start again`, options);
	}
}

export class MapFullError extends AgentError {
	readonly code = 'ERR_MAP_FULL';

	constructor(readonly map: string, readonly maxEntries: number, options?: ErrorOptions) {
		super(`map ${map} is full (${maxEntries} entries)${map === 'handshakes' ? '' : ': run `sidestep unload`, then start with a larger --max-pods'}`, options);
	}
}

/** A change of the kernel's maps that failed in the middle, and could not be taken back: what they hold of it is not known. */
export class TornChangeError extends AgentError {
	readonly code = 'ERR_TORN_CHANGE';

	/** @param undoing - why it could not be taken back. */
	constructor(undoing: unknown, options: ErrorOptions) {
		super(`its entries could be changed in part only (${reasonOf(options.cause)}), and not back (${reasonOf(undoing)}): mended soon`, options);
	}
}

export class OtherCgroupError extends AgentError {
	readonly code = 'ERR_OTHER_CGROUP';

	constructor(readonly link: string, readonly cgroup: string, options?: ErrorOptions) {
		super(`${link} is attached to another cgroup than ${cgroup}: start with the --cgroup it was started with, or run \`sidestep unload\` first`, options);
	}
}

/** The host lacks something. `remedy` is a whole clause. */
export class HostError extends AgentError {
	readonly code = 'ERR_HOST';

	constructor(readonly what: string, readonly remedy: string, options?: ErrorOptions) {
		super(`${what}: ${remedy}`, options);
	}
}

/** The kernel refused the object. Shows the end of the verifier's log; `log` has all of it. */
export class LoadError extends AgentError {
	readonly code = 'ERR_LOAD';
	readonly log: string;

	constructor(readonly object: string, cause: unknown) {
		const log = isNativeError(cause) ? cause.log ?? '' : '';
		const lines = log.split('\n').filter(line => line.trim() && !line.startsWith('processed '));
		const omitted = lines.length > 3 ? ` (${lines.length - 3} lines omitted)` : '';
		const tail = lines.length > 0 ? `\n  ${lines.slice(-3).join('\n  ')}${omitted}` : '';
		super(`the kernel does not take ${object} (${reasonOf(cause)}): run \`sidestep check\` to see what it lacks${tail}`, {cause});
		this.log = log;
	}
}
