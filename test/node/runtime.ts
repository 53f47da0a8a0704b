/** The container runtime of a {@link FakeHost}: sandboxes of pods, their processes, and namespaces that go from one pod to the next once nothing in the kernel is about the one before. */
import {ACCEPT, type FakeHost, type HostProcess, type Space} from '../helpers/fake-host.js';
import type {History, Sandbox} from './history.js';
import {STATIC_HASH} from './model.js';

export class Runtime {
	/** How often a pod got addresses that were another's a moment ago. */
	borrowed = 0;
	/** What was changed in a namespace before it was a pod's. */
	readonly presets = new Map<Space, ReadonlySet<string>>();
	/** Those that something may have been changed in. */
	readonly used = new Set<Space>();
	/** Those whose record somebody else took away: nobody knows what to take back. */
	readonly unrecorded = new Set<Space>();
	/** Namespaces whose pods are gone; each may be in the kernel still. */
	readonly #retired = new Set<Space>();
	/** Addresses, and who has them in place of those whose home they are. */
	readonly #lent = new Map<string, Space>();
	readonly #waiting: Space[] = [];
	#sandboxes = 0;

	constructor(readonly host: FakeHost) {}

	/** A namespace of the runtime's, with addresses: its own, or somebody's who is gone. */
	#takeSpace({draw}: History): Space {
		let space = this.host.take();
		while (space.home.some(address => this.#lent.has(address))) {
			this.#waiting.push(space);
			space = this.host.take();
		}

		const gone = [...this.#retired].filter(({home, addresses}) => home.every(address => addresses.has(address) && !this.#lent.has(address)));
		const isBorrowed = gone.length > 0 && draw.chance(0.25);
		const home = isBorrowed ? draw.one(gone).home : space.home;
		if (isBorrowed) {
			this.borrowed++;
			for (const address of home) {
				this.#lent.set(address, space);
			}
		}

		this.host.setAddresses(space, draw.chance(0.8) ? home : [draw.chance(0.8) ? home[0]! : home[1]!]);
		if (draw.chance(0.1)) {
			space.netns.setSysctl('/proc', ACCEPT, '1');
			this.used.add(space);
			this.presets.set(space, new Set([ACCEPT]));
		}

		return space;
	}

	makeSandbox(history: History): Sandbox {
		const {uid, annotations} = history.pod!;
		const sandbox = {uid, cgroupUid: annotations[STATIC_HASH] ?? uid, space: this.#takeSpace(history), id: `sandbox${++this.#sandboxes}`, file: undefined, processes: new Set<HostProcess>(), isLeft: false};
		history.sandboxes.push(sandbox);
		return sandbox;
	}

	startProcess(history: History, sandbox: Sandbox): HostProcess {
		const process = this.host.start(sandbox.cgroupUid, sandbox.space, history.form);
		sandbox.processes.add(process);
		return process;
	}

	endProcess(sandbox: Sandbox, process: HostProcess): void {
		sandbox.processes.delete(process);
		this.host.end(process);
	}

	/** @param leave - one process goes on, without the network. */
	endSandbox(history: History, sandbox: Sandbox, leave = false): void {
		const [survivor, ...others] = leave ? [...sandbox.processes] : [undefined, ...sandbox.processes];
		for (const process of others) {
			this.endProcess(sandbox, process!);
		}

		if (sandbox.file !== undefined) {
			this.host.unnameSpace(sandbox.file);
			sandbox.file = undefined;
		}

		if (survivor) {
			sandbox.isLeft = true;
			this.host.setAddresses(sandbox.space, []);
			return;
		}

		history.sandboxes.splice(history.sandboxes.indexOf(sandbox), 1);
		this.retire(sandbox.space);
	}

	/** A namespace that a process makes for itself. */
	takeInner(addresses: readonly string[]): Space {
		const space = this.host.take();
		this.host.setAddresses(space, addresses);
		return space;
	}

	hasBorrowed(space: Space): boolean {
		return [...this.#lent.values()].includes(space);
	}

	/** Nobody is in it any more. */
	retire(space: Space): void {
		this.#retired.add(space);
	}

	/** Makes those as new that nobody is in, and nothing is about. */
	takeBack(isForgotten: (space: Space) => boolean): void {
		for (const space of [...this.#retired].filter(space => isForgotten(space))) {
			this.#retired.delete(space);
			for (const [address, borrower] of this.#lent) {
				if (borrower === space) {
					this.#lent.delete(address);
				}
			}

			this.presets.delete(space);
			this.unrecorded.delete(space);
			if (this.used.delete(space)) {
				this.host.clear(space);
			}

			this.host.setAddresses(space, space.home);
			this.host.giveBack(space);
		}

		for (const space of this.#waiting.splice(0)) {
			this.host.giveBack(space);
		}
	}
}
