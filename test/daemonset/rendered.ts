/** The manifests as `kubectl apply -k` would send them. */
import path from 'node:path';
import {fileURLToPath} from 'node:url';
import {parseAllDocuments} from 'yaml';
import {must} from '../helpers/process.js';

export const ROOT = fileURLToPath(new URL('../../../', import.meta.url));
/** Where scripts/manifests.mjs puts them. */
export const TOOLS = path.join(ROOT, '.cache/manifests/bin');
export const OVERLAYS = ['ambient', 'sidecar', 'remove'] as const;
export type Overlay = typeof OVERLAYS[number];

export interface KubernetesObject {
	readonly apiVersion: string;
	readonly kind: string;
	readonly metadata: {readonly name: string; readonly namespace?: string; readonly labels?: Readonly<Record<string, string>>};
	readonly [more: string]: unknown;
}

/** What is read of the DaemonSet's container. */
export interface Container {
	readonly image: string;
	readonly args: readonly string[];
	readonly env: ReadonlyArray<{readonly name: string; readonly value?: string; readonly valueFrom?: {readonly fieldRef?: {readonly fieldPath: string}}}>;
	readonly ports: ReadonlyArray<{readonly name: string; readonly containerPort: number}>;
	readonly securityContext: {
		readonly runAsUser: number;
		readonly runAsGroup: number;
		readonly readOnlyRootFilesystem: boolean;
		readonly privileged?: boolean;
		readonly capabilities: {readonly drop: readonly string[]; readonly add: readonly string[]};
		readonly seccompProfile: {readonly type: string};
	};
	readonly volumeMounts: ReadonlyArray<{readonly name: string; readonly mountPath: string; readonly readOnly?: boolean; readonly mountPropagation?: 'HostToContainer' | 'Bidirectional' | 'None'}>;
	readonly readinessProbe: {readonly httpGet: {readonly path: string}};
	readonly livenessProbe: {readonly httpGet: {readonly path: string}};
}

export interface PodTemplate {
	readonly hostNetwork: boolean;
	readonly hostPID?: boolean;
	/** Of overlay remove: its steps. */
	readonly initContainers?: ReadonlyArray<Container & {readonly name: string}>;
	readonly containers: readonly [Container];
	readonly volumes: ReadonlyArray<{readonly name: string; readonly hostPath: {readonly path: string; readonly type: string}}>;
}

/** @param directory - below daemonset/. */
export function render(directory: string): string {
	return must(path.join(TOOLS, 'kubectl'), 'kustomize', path.join(ROOT, 'daemonset', directory));
}

export function objects(directory: string): readonly KubernetesObject[] {
	return parseAllDocuments(render(directory)).map(document => document.toJS() as KubernetesObject);
}

export function object<T = KubernetesObject>(all: readonly KubernetesObject[], kind: string): T {
	const found = all.filter(candidate => candidate.kind === kind);
	if (found.length !== 1) {
		throw new Error(`expected one ${kind}, found ${found.length}`);
	}

	return found[0] as T;
}

export function podTemplate(overlay: Overlay): PodTemplate {
	return object<{spec: {template: {spec: PodTemplate}}}>(objects(`overlays/${overlay}`), 'DaemonSet').spec.template.spec;
}
