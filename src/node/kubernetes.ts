/**
The agent in a cluster: pods from the API server, their starts from the CNI plugin, ztunnel told through ZDS.
*/
import type {Registry} from 'prom-client';
import type {PodSpec} from '../config/pods-file.js';
import {CniInstaller, type CniInstallerOptions} from '../cni/install.js';
import {CniServer} from '../cni/server.js';
import {KubernetesClient, type ClientTiming} from '../kubernetes/client.js';
import type {ReflectorTiming} from '../kubernetes/reflector.js';
import {EventWriter, StatusWriter} from '../kubernetes/status.js';
import type {NetnsIdentity, PodNetns} from '../pods/facts.js';
import type {Round} from '../pods/reconcile.js';
import type {NodeDefaults} from '../redirect/annotations.js';
import {ZdsServer} from '../zds/server.js';
import {Announcer} from './announcer.js';
import {cniHandler} from './calls.js';
import {Locator} from './locator.js';
import {registerNodeMetrics} from './metrics.js';
import {NodePods} from './pods.js';

export interface KubernetesOptions {
	/** This node's name, as pods' spec.nodeName has it. */
	readonly node: string;
	readonly server: string;
	readonly tokenFile?: string | undefined;
	readonly caFile?: string | undefined;
	readonly defaults: NodeDefaults;
	readonly excludeNamespaces: readonly string[];
	/** Where ztunnel connects. */
	readonly zdsSocket: string;
	/** Undefined: pods' starts are not held. */
	readonly cni?: Omit<CniInstallerOptions, 'log'> | undefined;
	/** Shorter in tests. */
	readonly timing?: {readonly client?: Partial<ClientTiming>; readonly reflector?: Partial<ReflectorTiming>} | undefined;
}

/** What it needs of the control loop. */
export interface LoopHandle {
	wake(names: Iterable<string>): void;
	/** Undefined while the loop has not looked at every pod once. */
	look(name: string): Round | undefined;
	namespaceOf(name: string): PodNetns | undefined;
	/** Of the kernel's entries for a pod of this name, whatever the agent knows of it. */
	modeInKernel(name: string): string | undefined;
}

export class KubernetesNode {
	/** A pod that fails does not make the agent unready: others would not be upgraded because of it. */
	readonly isStrict = false;
	readonly #pods: NodePods;
	readonly #zds: ZdsServer;
	readonly #announcer: Announcer;
	readonly #status: StatusWriter;
	readonly #events: EventWriter;
	readonly #client: KubernetesClient;
	readonly #installer: CniInstaller | undefined;
	readonly #end = new AbortController();
	#cni: CniServer | undefined;
	#loop: LoopHandle | undefined;
	#heard = Promise.resolve();

	/**
	@param proc - the host's /proc.
	@param former - see {@link Locator}.
	@throws InputError for options that cannot be.
	*/
	constructor(readonly options: KubernetesOptions, proc: string, former: (name: string) => NetnsIdentity | undefined, readonly log: (line: string) => void) {
		const {server, tokenFile, caFile, node, defaults, zdsSocket, timing, cni} = options;
		this.#client = new KubernetesClient({server, log, ...(tokenFile === undefined ? {} : {tokenFile}), ...(caFile === undefined ? {} : {caFile}), ...(timing?.client ? {timing: timing.client} : {})});
		const writer = {client: this.#client, log, signal: this.#end.signal};
		this.#status = new StatusWriter(writer);
		this.#events = new EventWriter(writer, node);
		this.#pods = new NodePods({
			client: this.#client, node, defaults, excludeNamespaces: new Set(options.excludeNamespaces), locator: new Locator(proc, former), log,
			...(timing?.reflector ? {timing: timing.reflector} : {}),
		});
		this.#zds = new ZdsServer({
			socketPath: zdsSocket, log, isHeld: true,
			onChange: uid => {
				this.#announcer.decided(uid);
			},
		});
		this.#announcer = new Announcer({
			zds: this.#zds, status: this.#status, events: this.#events, log,
			pod: name => this.#pods.pod(name),
			spec: name => this.#pods.specs.get(name),
			namespaceOf: name => this.#loop?.namespaceOf(name),
			modeInKernel: name => this.#loop?.modeInKernel(name),
		});
		this.#installer = cni && new CniInstaller({...cni, log});
	}

	get specs(): ReadonlyMap<string, PodSpec> {
		return this.#pods.specs;
	}

	get problems(): readonly string[] {
		return [
			...(this.#pods.isSynced ? [] : ['the API server has not told of all pods yet']),
			...Object.values(this.#pods.reflectors).flatMap(({problem}) => problem ?? []),
			...(this.#installer?.state.problem === undefined ? [] : [this.#installer.state.problem]),
			...(this.#cni?.problem === undefined ? [] : [this.#cni.problem]),
			...(this.#zds.problem === undefined ? [] : [this.#zds.problem]),
		];
	}

	/**
	ztunnel and the CNI plugin can connect; they wait until the first round is done.

	@throws HostError when a socket is taken.
	*/
	async listen(): Promise<void> {
		this.#zds.listen();
		if (this.options.cni) {
			this.#cni = new CniServer({
				socketPath: this.options.cni.socketPath,
				log: this.log,
				handler: cniHandler({pods: this.#pods, zds: this.#zds, look: name => this.#loop?.look(name), namespaceOf: name => this.#loop?.namespaceOf(name)}),
			});
			await this.#cni.listen();
		}
	}

	/**
	Follows the API server.

	@returns when all pods that there were are in {@link specs}; or `signal` aborted.
	*/
	async start(loop: LoopHandle, signal: AbortSignal): Promise<void> {
		this.#loop = loop;
		await new Promise<void>(resolve => {
			if (signal.aborted) {
				resolve();
				return;
			}

			signal.addEventListener('abort', () => {
				resolve();
			}, {once: true});
			this.#heard = this.#pods.run({
				onChange: names => {
					resolve();
					loop.wake(names);
				},
				onReport: names => {
					this.#announcer.reported(names);
				},
			}, this.#end.signal);
		});
	}

	/** The first round is done: from now on new pods wait for us. */
	settled(): void {
		this.#zds.release();
		this.#installer?.watch();
	}

	round(round: Round): void {
		this.#announcer.round(round);
	}

	registerMetrics(registry: Registry): void {
		registerNodeMetrics(registry, {client: this.#client, pods: this.#pods, zds: this.#zds, status: this.#status, events: this.#events, cni: () => this.#cni, installer: this.#installer});
	}

	/** The plugin stays, and asks the next agent; ztunnel goes on with what it has. */
	async close(): Promise<void> {
		this.#end.abort();
		this.#installer?.close();
		this.#zds.close();
		await this.#cni?.close();
		await this.#heard;
		this.#client.close();
	}
}
